"""Lets stock diffusers load this folder; the classes are those of the installed package sgg_fast."""

from sgg_fast.pipeline import SceneGraphToImagePipeline

__all__ = ["SceneGraphToImagePipeline"]
