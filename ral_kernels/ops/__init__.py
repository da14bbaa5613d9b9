"""The ops, a folder each: equations, arguments, interface and one module a backend."""
