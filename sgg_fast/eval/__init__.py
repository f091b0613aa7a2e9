"""How well pictures follow their graphs: metrics, floors and ceilings, as `python -m sgg_fast.eval` prints them."""
