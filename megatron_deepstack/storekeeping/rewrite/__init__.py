"""New stores from finished ones, without decoding a picture."""
