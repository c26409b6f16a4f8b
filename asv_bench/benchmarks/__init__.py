"""The asv suite. A host that is not installed skips its benchmarks: `setup` raises NotImplementedError."""
