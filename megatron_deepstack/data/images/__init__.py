"""Images to views: finding a file, decoding it without trusting it, resizing and cutting."""
