"""What the named things of a recipe are: the members of the family, the vision towers, the decoder families.

Each is a row of a table, written down once, as data. Everything else (planning, model, conversion, reports) asks the
row for a property, such as `traits.has_class_token`, and never for a name. So one more tower or family that is built
from known properties is one more row, and a program of its own can add rows with `register_tower` and
`register_family`.

    variants     which views a variant looks at, what stands in the sequence, where stacks enter
    towers       what a vision tower is made of, and how Hugging Face names it
    families     what a decoder family computes, and how Hugging Face names it
    installed    rows that other installed packages add
    hf_fields    how a row says what the keys of a Hugging Face config.json mean

Begin with `variants`: it is the shortest, and shows the form of the others.
"""
