//! The host stub's image. Everything is in the library; `arch` has the entry.

#![no_std]
#![no_main]

use host_stub as _;
