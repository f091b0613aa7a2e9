"""Inputs and checks that the tests of networks share."""
