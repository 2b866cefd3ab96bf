"""What does a model remember, and what did removal take away?"""
