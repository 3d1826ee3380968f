"""The version of this package, in a file that imports nothing.

Every room may name it, in records and saved files, without importing the public face of the package.
"""

__version__ = "0.2.0"
