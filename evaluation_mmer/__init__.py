"""Scores of a merged model on tasks, and what they are compared with. Stays home: nothing here travels to the Hub."""
