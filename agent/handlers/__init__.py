"""One module per family of verbs. A handler is a coroutine over an operation's steps; it knows no bus and no store."""
