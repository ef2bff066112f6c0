"""Models and indexes of this package in the interfaces of other libraries, one module for each."""
