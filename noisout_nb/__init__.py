"""noisout_nb: the thin helper package behind the noisOut notebooks, one module a stage."""
