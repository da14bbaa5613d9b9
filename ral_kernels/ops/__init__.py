"""The ops. A folder holds equations, arguments, interface and one module a backend."""
