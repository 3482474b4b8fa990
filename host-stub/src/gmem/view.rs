//! The view: what one VM sees of an inode, and which memory slots are bound to which of its pages.
//!
//! Bindings never overlap. A binding is prepared (which may fail) before the slot changes and committed
//! (which cannot) after.

use alloc::collections::BTreeMap;
use alloc::rc::Rc;
use core::cell::RefCell;
use core::ops::Range;

use super::Inode;
use crate::errno::Errno;
use crate::kvm::Vm;

/// One VM's view of an inode. It pins the VM.
#[derive(Debug)]
pub struct View {
    inode: Rc<Inode>,
    vm: Rc<Vm>,
    bindings: RefCell<BTreeMap<u64, Binding>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Binding {
    end: u64,
    slot: u16,
}

/// A binding that was checked and can be committed.
#[derive(Debug)]
#[must_use = "a prepared binding does nothing until it is committed"]
pub struct PreparedBinding<'v> {
    view: &'v View,
    pages: Range<u64>,
    slot: u16,
}

impl View {
    /// Makes a view without bindings.
    pub fn new(inode: Rc<Inode>, vm: Rc<Vm>) -> Self {
        Self { inode, vm, bindings: RefCell::default() }
    }

    /// The inode.
    pub fn inode(&self) -> &Rc<Inode> {
        &self.inode
    }

    /// The VM.
    pub fn vm(&self) -> &Rc<Vm> {
        &self.vm
    }

    /// Checks that pages can be bound to a slot: EEXIST if one of them is bound already.
    pub fn prepare(&self, pages: Range<u64>, slot: u16) -> Result<PreparedBinding<'_>, Errno> {
        let bindings = self.bindings.borrow();
        let before = bindings.range(..pages.end).next_back();
        if before.is_some_and(|(_, binding)| binding.end > pages.start) {
            return Err(Errno::EEXIST);
        }
        drop(bindings);
        Ok(PreparedBinding { view: self, pages, slot })
    }

    /// Forgets the binding that starts at this page.
    pub fn unbind(&self, first: u64) {
        self.bindings.borrow_mut().remove(&first);
    }

    /// Slots whose bindings share a page with the range.
    pub fn bound_slots(&self, pages: &Range<u64>) -> alloc::vec::Vec<u16> {
        let bindings = self.bindings.borrow();
        bindings
            .range(..pages.end)
            .filter(|(_, binding)| binding.end > pages.start)
            .map(|(_, binding)| binding.slot)
            .collect()
    }

    /// Takes the view apart.
    pub fn into_parts(self) -> (Rc<Inode>, Rc<Vm>) {
        (self.inode, self.vm)
    }
}

impl PreparedBinding<'_> {
    /// Binds. Cannot fail.
    pub fn commit(self) {
        let binding = Binding { end: self.pages.end, slot: self.slot };
        self.view.bindings.borrow_mut().insert(self.pages.start, binding);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMachine;

    #[test]
    fn overlapping_pages_are_not_bound_twice_and_freed_ones_are() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let vm = Rc::new(Vm::new(&mut host, 1 << 31).unwrap());
        let inode = Rc::new(Inode::new(&mut host, 8 * 4096, 3).unwrap());
        let view = View::new(inode, vm);
        view.prepare(0..2, 1).unwrap().commit();
        view.prepare(4..6, 2).unwrap().commit();
        for pages in [0..1, 1..3, 3..5, 5..6, 0..8] {
            assert_eq!(view.prepare(pages, 3).err(), Some(Errno::EEXIST));
        }
        view.prepare(2..4, 3).unwrap().commit();
        view.unbind(0);
        view.prepare(0..2, 4).unwrap().commit();
        assert_eq!(view.bound_slots(&(1..3)), [4, 3]);
    }

    #[test]
    fn a_prepared_binding_that_is_dropped_binds_nothing() {
        let machine = FakeMachine::new(32);
        let mut host = machine.host();
        let vm = Rc::new(Vm::new(&mut host, 1 << 31).unwrap());
        let inode = Rc::new(Inode::new(&mut host, 8 * 4096, 3).unwrap());
        let view = View::new(inode, vm);
        drop(view.prepare(0..2, 1).unwrap());
        assert!(view.bound_slots(&(0..8)).is_empty());
    }
}
