"""The plan of a step's exchange: which row of which view goes to which rank.

The one idea: an image's grid determines its rows, and the layout determines the rank that adds each row. So each rank
computes its part of the exchange without communication, and the parts of all ranks fit together.

    samplers, rows            which token of which view becomes which row of which stack
    vit_stacks                the stacks that DeepStack-V adds in the ViT
    image_plan                the rows of one image, by slot
    routes, route_sides       the rows that one rank sends and receives

Begin with `rows.image_rows`, and end with `routes.plan_routes`.
"""
