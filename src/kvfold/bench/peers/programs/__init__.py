"""Programs that the interpreters of rivals run, each by its path; they import nothing of kvfold."""
