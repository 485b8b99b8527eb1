"""The papers that model cards cite, in the form that TRL reads."""

KNOWLEDGE_DISTILLATION = {
    "title": "Distilling the Knowledge in a Neural Network",
    "id": "1503.02531",
    "citation": "@article{hinton2015distilling,\n"
    "    title   = {{Distilling the Knowledge in a Neural Network}},\n"
    "    author  = {Geoffrey Hinton and Oriol Vinyals and Jeff Dean},\n"
    "    year    = 2015,\n"
    "    journal = {arXiv preprint arXiv:1503.02531}\n}",
}
SPECULATIVE_KD = {
    "title": "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved Sampling",
    "id": "2410.11325",
    "citation": "@inproceedings{xu2025speculative,\n"
    "    title     = {{Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through Interleaved "
    "Sampling}},\n"
    "    author    = {Wenda Xu and others},\n"
    "    year      = 2025,\n"
    "    booktitle = {ICLR}\n}",
}
