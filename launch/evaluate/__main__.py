"""`python -m longreach.launch.evaluate`."""

from . import main

main()
