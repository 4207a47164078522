"""The store: its layout, the only writer and the only reader of its arrays, here and in a bucket."""
