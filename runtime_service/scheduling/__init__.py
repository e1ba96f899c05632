"""Who runs next, decided with integers alone: imports neither torch nor `execution`."""
