"""The bundled environment models: one short program a file, most of known values."""
