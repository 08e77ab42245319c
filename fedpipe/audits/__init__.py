"""Audits: what an attacker can really tell from a run, beside what its epsilon allows.

`preparing` opens a run with canaries, which the ordinary steps then compute; `scores` are an
observer's view of each canary, `verdict` what they say of the claimed epsilon, `membership` how
well losses tell trained records from others. The mathematics is in `fedpipe.privacy.audit` and
`fedpipe.privacy.membership`; the canaries and their coins in `fedpipe.data.canaries` and
`fedpipe.steps.canaries`. Nothing here is used by a run that is not audited.
"""
