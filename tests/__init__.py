import utils  # noqa: F401 - how OpenMP waits, to be said before torch is loaded
