//! What a program has open: descriptors, and what they stand for.

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::Cell;

use crate::errno::Errno;
use crate::gmem::View;
use crate::kvm::{VcpuRef, Vm};

/// Descriptors that a program may have open (its RLIMIT_NOFILE).
pub const LIMIT: usize = 256;

/// What a descriptor stands for.
#[derive(Debug)]
pub enum File {
    /// The console.
    Console,
    /// A file of the ramdisk.
    Ramdisk {
        /// Its content.
        data: &'static [u8],
        /// Its inode number.
        number: u64,
        /// Where the next read begins.
        position: Cell<u64>,
    },
    /// `/dev/kvm`.
    Kvm,
    /// A VM.
    Vm(Rc<Vm>),
    /// A vCPU.
    Vcpu(VcpuRef),
    /// A guest_memfd.
    Gmem(Rc<View>),
    /// `/dev/deed`.
    Deed,
}

/// A table of descriptors.
#[derive(Debug, Default)]
pub struct Files {
    slots: Vec<Option<Rc<File>>>,
}

/// A free descriptor, found before what it will stand for is made.
#[derive(Clone, Copy, Debug)]
pub struct Vacant(usize);

impl Files {
    /// A table whose first three descriptors are the console.
    pub fn with_console() -> Self {
        let console = Rc::new(File::Console);
        Self { slots: alloc::vec![Some(console.clone()), Some(console.clone()), Some(console)] }
    }

    /// Finds the lowest free descriptor. EMFILE if there is none.
    pub fn vacant(&self) -> Result<Vacant, Errno> {
        let index = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        if index < LIMIT { Ok(Vacant(index)) } else { Err(Errno::EMFILE) }
    }

    /// Opens a file there; returns the descriptor.
    pub fn put(&mut self, vacant: Vacant, file: File) -> Result<u64, Errno> {
        if vacant.0 >= self.slots.len() {
            self.slots.resize(vacant.0.saturating_add(1), None);
        }
        let slot = self.slots.get_mut(vacant.0).ok_or(Errno::EMFILE)?;
        *slot = Some(Rc::new(file));
        Ok(vacant.0 as u64)
    }

    /// The file at a descriptor. EBADF if none is open there. Only the lower 32 bits count, as in Linux.
    pub fn get(&self, descriptor: u64) -> Result<Rc<File>, Errno> {
        let index = (descriptor as u32) as usize;
        self.slots.get(index).and_then(Option::as_ref).cloned().ok_or(Errno::EBADF)
    }

    /// Takes a descriptor out. The caller lets go of the file.
    pub fn take(&mut self, descriptor: u64) -> Result<Rc<File>, Errno> {
        let index = (descriptor as u32) as usize;
        self.slots.get_mut(index).and_then(Option::take).ok_or(Errno::EBADF)
    }

    /// All open files.
    pub fn iter(&self) -> impl Iterator<Item = &Rc<File>> {
        self.slots.iter().flatten()
    }

    /// Takes all out.
    pub fn take_all(&mut self) -> Vec<Rc<File>> {
        core::mem::take(&mut self.slots).into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_descriptor_is_used() {
        let mut files = Files::with_console();
        assert_eq!(files.put(files.vacant().unwrap(), File::Kvm), Ok(3));
        files.take(1).unwrap();
        assert_eq!(files.put(files.vacant().unwrap(), File::Deed), Ok(1));
        assert!(matches!(*files.get(1).unwrap(), File::Deed));
    }

    #[test]
    fn closed_and_absurd_descriptors_are_ebadf() {
        let mut files = Files::with_console();
        files.take(2).unwrap();
        for descriptor in [2, 3, u64::MAX, 1 << 31] {
            assert_eq!(files.get(descriptor).err(), Some(Errno::EBADF));
            assert_eq!(files.take(descriptor).err(), Some(Errno::EBADF));
        }
    }

    #[test]
    fn the_table_is_bounded() {
        let mut files = Files::with_console();
        for _ in 3..LIMIT {
            files.put(files.vacant().unwrap(), File::Kvm).unwrap();
        }
        assert_eq!(files.vacant().err(), Some(Errno::EMFILE));
    }
}
