"""What the lesson can do without: the command line, speed, file formats, pictures of the way."""
