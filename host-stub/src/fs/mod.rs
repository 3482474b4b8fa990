//! Files: the ramdisk and the table of what a program has open.

pub mod cpio;
pub mod files;

pub use cpio::Archive;
pub use files::{File, Files};
