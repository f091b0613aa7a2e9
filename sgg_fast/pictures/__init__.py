"""Pictures made of pictures and graphs: sheets, and the drawing of a scene graph. Pixels only, no models."""
