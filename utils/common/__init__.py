"""What every room may use: errors, files, signals, ranks. It imports only the standard library."""
