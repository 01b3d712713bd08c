"""Short programs that a user would copy: complete training runs around the library's layers."""
