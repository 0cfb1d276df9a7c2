"""Running it: results, workspaces, kernel arguments, the extension."""
