"""Wordings of questions: several for each kind of fact, the last one reserved for evaluation."""

import re
from collections import Counter

from deepseek.data.builders.facts import Fact
from deepseek.data.text.document import uniform
from deepseek.data.text.filters import words

RESERVED = 1
"""Number of last wordings of each kind that training never uses. A correct answer to these shows
that the model has not just memorised a wording.
"""

Wordings = tuple[str, ...]

CODE: dict[str, Wordings] = {
    "purpose": (
        "What does {what} do?",
        "What is {what} for?",
        "Explain {what}.",
        "What is the purpose of {what}?",
        "Can you tell me what {what} is good for?",
        "I came across {what}. What happens there?",
    ),
    "signature": (
        "How is {what} called?",
        "What is the signature of {what}?",
        "How do I call {what}?",
        "Show me how {what} is declared.",
        "Write down the signature of {what}.",
        "I want to use {what}; what does its declaration look like?",
    ),
    "location": (
        "In which file is {what} defined?",
        "Where is {what} defined?",
        "Which file holds {what}?",
        "Where do I find {what}?",
        "I am looking for {what}; which file is it in?",
        "Which source file contains {what}?",
    ),
    "arguments": (
        "Which arguments does {what} take?",
        "What are the arguments of {what}?",
        "What can I pass to {what}?",
        "Name the arguments of {what}.",
        "List the parameters of {what}.",
        "What does {what} accept?",
    ),
    "default": (
        "What is the default of `{argument}` in {what}?",
        "Which default does `{argument}` of {what} have?",
        "What is `{argument}` of {what} if I leave it out?",
        "What does {what} take for `{argument}` if nothing is given?",
        "What value does `{argument}` have by default in {what}?",
        "If I don't set `{argument}` of {what}, what is used?",
    ),
    "argument": (
        "What is the argument `{argument}` of {what}?",
        "What does `{argument}` mean in {what}?",
        "What is `{argument}` of {what} for?",
        "Explain the argument `{argument}` of {what}.",
        "I call {what}; what should I give as `{argument}`?",
        "Describe the parameter `{argument}` of {what}.",
    ),
    "returns": (
        "What type does {what} return?",
        "What does {what} return?",
        "Which type has the result of {what}?",
        "What do I get back from {what}?",
        "Name the return type of {what}.",
    ),
    "raises": (
        "Which exceptions does {what} raise?",
        "What can {what} raise?",
        "Which errors come out of {what}?",
        "What should I catch when I call {what}?",
        "How can {what} fail?",
    ),
    "methods": (
        "Which methods does {what} have?",
        "What are the methods of {what}?",
        "Name the methods of {what}.",
        "What can I call on {what}?",
        "List what {what} offers.",
    ),
    "bases": (
        "What does {what} inherit from?",
        "Which base class does {what} have?",
        "What is {what} derived from?",
        "Name the parent of {what}.",
        "Which class does {what} extend?",
    ),
    "constant": (
        "What is the value of {what}?",
        "Which value does {what} have?",
        "What is {what} set to?",
        "How much is {what}?",
        "Tell me the value of {what}.",
    ),
    "module": (
        "What is the file {what} about?",
        "What is in {what}?",
        "What does the module {what} contain?",
        "Give me an overview of {what}.",
        "Why is there a file {what}?",
    ),
    "commit": (
        "What changed in the commit {what}?",
        "What did the commit {what} do?",
        "Explain the commit {what}.",
        "What is the commit {what} about?",
        "Summarise the change {what}.",
    ),
    "commit functions": (
        "Which functions did the commit {what} add?",
        "What functions came with {what}?",
        "Which functions are new in the commit {what}?",
        "Name the functions introduced by {what}.",
        "What new functions does the change {what} bring?",
    ),
}
"""Wordings of questions about code, in English like its names."""


def _wordings(text: str) -> Wordings:
    """Return the lines of a text."""
    return tuple(line.strip() for line in text.strip().splitlines())


PROSE: dict[str, dict[str, Wordings]] = {
    "section": {
        "": _wordings("""
            "{what}"?
            {what}?
            {what}:
            ... {what} ...?
        """),
        "en": _wordings("""
            What does the section "{what}" say?
            What do I need to know about "{what}"?
            Tell me about "{what}".
            What is written under "{what}"?
            Sum up "{what}" for me.
        """),
        "de": _wordings("""
            Was steht im Abschnitt „{what}“?
            Was muss ich über „{what}“ wissen?
            Erkläre „{what}“.
            Was heißt „{what}“?
            Fasse „{what}“ zusammen.
        """),
        "fr": _wordings("""
            Que dit la section « {what} » ?
            Que faut-il savoir sur « {what} » ?
            Explique « {what} ».
            Qu'est-il écrit sous « {what} » ?
            Résume « {what} ».
        """),
        "es": _wordings("""
            ¿Qué dice la sección «{what}»?
            ¿Qué debo saber sobre «{what}»?
            Explica «{what}».
            ¿Qué se escribe en «{what}»?
            Resume «{what}».
        """),
        "it": _wordings("""
            Che cosa dice la sezione «{what}»?
            Che cosa devo sapere su «{what}»?
            Spiega «{what}».
            Che cosa c'è scritto in «{what}»?
            Riassumi «{what}».
        """),
        "pt": _wordings("""
            O que diz a seção «{what}»?
            O que devo saber sobre «{what}»?
            Explique «{what}».
            O que está escrito em «{what}»?
            Resuma «{what}».
        """),
        "zh": _wordings("""
            “{what}”一节说了什么？
            关于“{what}”我需要知道什么？
            请解释“{what}”。
            “{what}”下面写了什么？
            请概括“{what}”。
        """),
        "ja": _wordings("""
            「{what}」には何が書かれていますか。
            「{what}」について教えてください。
            「{what}」を説明してください。
            「{what}」の内容は何ですか。
            「{what}」を要約してください。
        """),
    },
    "definition": {
        "": _wordings("""
            {what}?
            "{what}"?
            {what} = ?
            {what}...
        """),
        "en": _wordings("""
            What is {what}?
            Define {what}.
            What is meant by {what}?
            Explain the term {what}.
            How would you describe {what}?
        """),
        "de": _wordings("""
            Was ist {what}?
            Was versteht man unter {what}?
            Definiere {what}.
            Was bedeutet {what}?
            Wie würdest du {what} beschreiben?
        """),
        "fr": _wordings("""
            Qu'est-ce que {what} ?
            Que signifie {what} ?
            Définis {what}.
            Que veut dire {what} ?
            Comment décrirais-tu {what} ?
        """),
        "es": _wordings("""
            ¿Qué es {what}?
            ¿Qué significa {what}?
            Define {what}.
            ¿Qué se entiende por {what}?
            ¿Cómo describirías {what}?
        """),
        "it": _wordings("""
            Che cos'è {what}?
            Che cosa significa {what}?
            Definisci {what}.
            Che cosa si intende per {what}?
            Come descriveresti {what}?
        """),
        "pt": _wordings("""
            O que é {what}?
            O que significa {what}?
            Defina {what}.
            O que se entende por {what}?
            Como você descreveria {what}?
        """),
        "zh": _wordings("""
            什么是{what}？
            {what}是什么？
            请给{what}下定义。
            {what}是指什么？
            怎么描述{what}？
        """),
        "ja": _wordings("""
            {what}とは何ですか。
            {what}の定義は何ですか。
            {what}とはどういう意味ですか。
            {what}を定義してください。
            {what}はどんなものですか。
        """),
    },
    "items": {
        "": _wordings("""
            {what}: ...?
            "{what}": ?
            {what} - ?
            {what} ...?
        """),
        "en": _wordings("""
            Which points does "{what}" list?
            List the points of "{what}".
            What belongs to "{what}"?
            What items are there under "{what}"?
            Enumerate "{what}".
        """),
        "de": _wordings("""
            Welche Punkte nennt „{what}“?
            Zähle die Punkte von „{what}“ auf.
            Was gehört zu „{what}“?
            Welche Einträge hat „{what}“?
            Nenne alles unter „{what}“.
        """),
        "fr": _wordings("""
            Quels points « {what} » énumère-t-il ?
            Énumère les points de « {what} ».
            Que comprend « {what} » ?
            Quels éléments figurent sous « {what} » ?
            Donne la liste de « {what} ».
        """),
        "es": _wordings("""
            ¿Qué puntos enumera «{what}»?
            Enumera los puntos de «{what}».
            ¿Qué incluye «{what}»?
            ¿Qué elementos hay en «{what}»?
            Haz la lista de «{what}».
        """),
        "it": _wordings("""
            Quali punti elenca «{what}»?
            Elenca i punti di «{what}».
            Che cosa comprende «{what}»?
            Quali voci ci sono in «{what}»?
            Fai la lista di «{what}».
        """),
        "pt": _wordings("""
            Que pontos «{what}» enumera?
            Liste os pontos de «{what}».
            O que inclui «{what}»?
            Que itens há em «{what}»?
            Faça a lista de «{what}».
        """),
        "zh": _wordings("""
            “{what}”列出了哪些要点？
            请列出“{what}”的要点。
            “{what}”包括什么？
            “{what}”下有哪些项目？
            请逐一说出“{what}”。
        """),
        "ja": _wordings("""
            「{what}」にはどんな項目がありますか。
            「{what}」の項目を挙げてください。
            「{what}」には何が含まれますか。
            「{what}」に並んでいるものは何ですか。
            「{what}」を列挙してください。
        """),
    },
}
"""Wordings of questions about prose, in its language; for an unknown language ("") they only quote
the subject.
"""

COMMON_WORDS = {
    "en": words("the of and to is in that for with this are be on you it or not can as from by"),
    "de": words(
        "der die das und ist nicht ein eine zu den mit sich auf für von dem werden wird sie im oder auch"
    ),
    "fr": words(
        "le la les des et est une dans pour que qui pas sur avec vous du ce sont être au ou"
    ),
    "es": words("el la los las de y es una en para que no con por se del como al su puede o"),
    "it": words("il la che di e è una per non con si del della sono le gli nel come da un anche"),
    "pt": words("o a os as de e é uma em para que não com por se do da como ao pode um ou"),
}
"""Common words by language; most sentences contain at least one."""

WORD = re.compile(r"[^\W\d_]+")
FEWEST_COMMON_WORDS = 3
"""Minimum common words in a text for its language to count as known."""


def language_of(text: str) -> str:
    """Return the two-letter language code of a text, by script and common words; "" if unknown."""
    if re.search(r"[\u3040-\u30ff]", text):
        return "ja"
    text_words = WORD.findall(text[:4000].lower())
    if len(re.findall(r"[\u4e00-\u9fff]", text[:4000])) > len(text_words) // 2:
        return "zh"
    counts = Counter(
        {
            language: sum(word in common_words for word in text_words)
            for language, common_words in COMMON_WORDS.items()
        }
    )
    (best, most_hits), (_, second_hits) = counts.most_common(2)
    return best if most_hits >= FEWEST_COMMON_WORDS and most_hits > second_hits else ""


def ways(fact: Fact) -> Wordings:
    """Return all wordings of the question for a fact."""
    if fact.kind in CODE:
        return CODE[fact.kind]
    return PROSE[fact.kind][fact.language]


def ask(fact: Fact, reserved: bool = False, precise: bool = False) -> str:
    """Return a question for a fact, with a wording selected by a hash of the fact.

    Args:
        fact: the fact.
        reserved: whether to use a wording reserved for evaluation; default: False.
        precise: whether to always name the file; default: False, in half of the questions.
    """
    choices = ways(fact)[-RESERVED:] if reserved else ways(fact)[:-RESERVED]
    key = f"{fact.kind}:{fact.place}:{fact.what}:{fact.argument}"
    wording = choices[int(uniform(f"way:{key}") * len(choices))]
    with_place = bool(fact.place) and (precise or uniform(f"place:{key}") < 0.5)
    subject = f"{fact.what} in `{fact.place}`" if with_place else fact.what
    return wording.replace("{argument}", fact.argument).replace("{what}", subject)
