from lib.standard_library import conversation, docstrings

SOURCE = '''
"""About the module."""

def one(a, *, b: int = 1) -> str:
    """About one.

    More:
        Indented.
    """

@decorator
class Two(Base):
    """About Two."""

    def silent(self): ...

    async def three(self):
        """About three."""
'''


def test_docstrings_stand_under_what_they_document():
    assert docstrings(SOURCE.encode()) == [
        "About the module.",
        "def one(a, *, b: int=1) -> str:\n    About one.\n\n    More:\n        Indented.",
        "class Two(Base):\n    About Two.",
        "async def three(self):\n    About three.",
    ]
    assert docstrings(b"print 'Python 2'") == []
    assert docstrings(b"x = 1") == []


def test_a_conversation_asks_for_the_first_paragraph():
    _, one, two, _ = docstrings(SOURCE.replace("About one.", "About\n    one.").encode())
    assert conversation(one) == [
        {"role": "user", "content": "What is this?\n\ndef one(a, *, b: int=1) -> str:"},
        {"role": "assistant", "content": "About one."},
    ]
    assert conversation(two)[1]["content"] == "About Two."
