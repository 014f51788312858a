"""How rounds and devices may be called: one place for all that read such a name. Pure, and without numpy for devices.

A colon parts the fields of mosquitto's password file, a slash, + and # have a meaning in topics: a device that is registered
has none of them. Devices that nobody registers (open mode) may have a colon, as many are called by their hardware's address.
"""

NAME = r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}"
DEVICE = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}"
NAME_RULE = "1 to 128 of a-z, A-Z, 0-9 and ._:@-, a letter or digit first"
DEVICE_RULE = "1 to 128 of a-z, A-Z, 0-9 and ._@-, a letter or digit first"
