"""A page in the browser to draw with: `python -m sgg_fast.app`. The pictures are those of `sgg_fast.drawing`.

`server` answers HTTP, `guard` checks requests, `studio` holds the model and draws one request after the other,
`reading` turns words, JSON and files into graphs, `static/` is the page.
"""
