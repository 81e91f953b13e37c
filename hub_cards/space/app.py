"""The page of a Hugging Face Space, or of `python app.py MODEL` on any machine: see chat_page."""

from chat_page import start

if __name__ == "__main__":
    start()
