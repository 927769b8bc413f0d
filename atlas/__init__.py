"""The embedded world, the Atlas: what builds it, what reads it, its judges."""
