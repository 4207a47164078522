"""`doctor`: what this machine offers and lacks. `host` looks, `probe` tries heavy things in processes of their own."""
