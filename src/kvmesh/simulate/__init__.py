"""The mesh under a virtual clock: the core's own router, index, load table, pool and queue over modelled engines."""
