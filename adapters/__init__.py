"""ce_fast in the words of other libraries: one thin module each, which alone imports its host."""

if __name__ != "ce_fast.adapters":
    raise ImportError(f"this package is ce_fast.adapters, not {__name__}; install ce_fast and import it by that name")
