"""What makes training private: noise that is secret and repeatable, what it costs, and who has spent it."""
