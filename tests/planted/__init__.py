"""Named checks of the private mechanism, and the bugs that they must find (see `test_planted_bugs`)."""
