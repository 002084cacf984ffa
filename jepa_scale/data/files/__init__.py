"""Files of data wherever they are: addresses, downloads, the bounded cache, compression."""
