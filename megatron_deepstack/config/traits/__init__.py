"""What the named things of a recipe are: the members of the family, the vision towers, the decoder families.

The one idea: each of them is one entry of a table, and the entry holds its properties as data. All other code
(planning, model, conversion, reports) asks for a property, such as `traits.has_class_token`, and never for a name. So a
new tower or family that combines known properties needs only one more entry, and another program can add entries with
`register_tower` and `register_family`.

    variants     which views a variant uses, what an image becomes in the sequence, where stacks are added
    towers       what a vision tower is made of, and how Hugging Face names it
    families     what a decoder family computes, and how Hugging Face names it
    installed    entries that other installed packages add
    hf_fields    how an entry describes the keys of a Hugging Face config.json

Begin with `variants`: it is the shortest, and the other tables have the same form.
"""
