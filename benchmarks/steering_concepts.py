"""The concepts that steering is measured on, and prompts that ask for none of them."""

from dataclasses import dataclass

NEUTRAL = [
    "I went for a walk in the park and",
    "The teacher told the class that the most important thing is",
    "My friend called me yesterday to say that",
    "The best way to cook rice is",
    "When the doctor came into the room,",
    "The company announced this morning that",
]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a latent is to be about."""

    name: str
    words: str
    """Expression of whole words or signs: labels of AUC, the concept's next tokens, what texts are searched for."""
    text: str
    """brown, docs or language."""
    instruction: str
    """Of prompting."""
    avoid: str
    """Of prompting to suppress it."""
    pair: tuple[str, str]
    """Of activation addition."""
    prompts: tuple[str, ...]
    """After which it comes by itself, to suppress it."""
    lead: str = "This is how the story goes."
    """Before each of these: an SAE knows nothing of first positions, so steering leaves them alone."""
    bounded: bool = True
    """Whether matches are whole words."""

    @property
    def expression(self) -> str:
        """To search texts for."""
        return rf"(?<!\w)(?:{self.words})(?!\w)" if self.bounded else self.words


CONCEPTS = (
    Concept(
        name="dates",
        words=r"January|February|March|April|May|June|July|August|September|October|November|December|(?:1[89]|20)\d\d",
        text="brown",
        instruction="Write about dates, months and years.",
        avoid="Do not mention any months or years.",
        pair=("It happened on 5 May 2003", "It happened on the way home"),
        prompts=(
            "She was born on", "The war ended in", "The company was founded in", "The book was first published in",
            "The meeting will take place on", "He died on the morning of",
        ),
    ),
    Concept(
        name="quotation",
        words='["“”]',
        bounded=False,
        text="brown",
        instruction="Quote what people say, in quotation marks.",
        avoid="Do not quote anybody and do not use quotation marks.",
        pair=('He said, "I am here."', "He said that he was there."),
        prompts=(
            "She looked at him and said,", "The president replied:", "The word", "He opened the door and shouted,",
            "The sign on the wall said", "My grandmother always told me:",
        ),
    ),
    Concept(
        name="digits",
        words=r"\d+",
        text="docs",
        instruction="Write with many numbers, as digits.",
        avoid="Do not use any numbers or digits.",
        pair=("1, 2, 3, 4, 5, 6", "one thing and another thing"),
        prompts=(
            "The price of the ticket is $", "The answer to the sum is", "The train leaves at", "Chapter",
            "The population of the city is", "The temperature today is",
        ),
    ),
    Concept(
        name="her",
        words="[Ss]he|[Hh]er|[Hh]ers|[Hh]erself",
        text="brown",
        instruction="Write about what a woman does.",
        avoid="Do not write about a woman.",
        pair=("She took her hat and went to her sister", "He took his hat and went to his brother"),
        prompts=(
            "My mother was tired, so", "The girl lost", "The actress smiled when", "Anna told us that",
            "The queen walked into the hall with", "My sister likes to read because",
        ),
    ),
    Concept(
        name="files",
        words="[Ff]iles?|[Ff]olders?|[Dd]irectory|[Dd]irectories",
        text="docs",
        instruction="Write about files and folders on a computer.",
        avoid="Do not mention files, folders or directories.",
        pair=("Open the file in this folder", "Open the window in this room"),
        prompts=(
            "To save your work, choose a", "The program reads its settings from a", "Delete the", "The archive contains many",
            "Click here to download the", "Copy the picture into the",
        ),
    ),
    Concept(
        name="german",
        words="[Dd]er|[Dd]ie|[Dd]as|[Uu]nd|[Ii]st|[Nn]icht|[Ee]ine?|[Ss]ie|[Ww]ird|[Ww]erden|mit|[Ff]ür|von|zu|den|auf|im|dem",
        text="language",
        instruction="Schreibe auf Deutsch.",
        lead="So geht die Geschichte weiter.",
        avoid="Write in English only, not in German.",
        pair=("Das ist ein schöner Tag und wir gehen in den Wald", "This is a beautiful day and we go to the forest"),
        prompts=(
            "Ich gehe heute in", "Das Haus ist", "Wir haben gestern", "Die Katze schläft auf",
            "Der Lehrer sagt, dass", "Am Morgen trinke ich",
        ),
    ),
    Concept(
        name="questions",
        words=r"\?",
        bounded=False,
        text="brown",
        instruction="Ask questions.",
        avoid="Do not ask any questions.",
        pair=("Where are you? What is it? Why?", "I am here. It is this. So."),
        prompts=(
            "Who knows why", "What would happen if", "How can we", "Do you think that", "Where did you put",
            "Why is the sky",
        ),
    ),
)  # fmt: skip
