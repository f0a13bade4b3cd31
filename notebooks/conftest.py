"""pytest reads this before it starts a kernel: the notebooks are tested in the environment that recorded them."""

from notebooks import fix_environment  # .ci/notebooks.py

fix_environment()
collect_ignore_glob = ["scripts/*"]  # --doctest-modules would import them, that is, run every notebook a second time
