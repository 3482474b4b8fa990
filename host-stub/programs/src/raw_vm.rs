//! A VM made by host calls alone: the program is its host, the kernel knows nothing of it.

use alloc::vec::Vec;

use abi::host::VM_ROOT_PAGES;
use abi::{HostCall, VmFlags, VmHandle};

use crate::deed::Deed;
use crate::{Failure, failure};

/// The VM, and the kernel's pages that it was made of.
#[derive(Debug)]
pub struct RawVm {
    handle: VmHandle,
    /// The root: the pages that were taken for it, of which two are aligned.
    root: u64,
    /// Runs of pages that its tables got.
    lent: Vec<(u64, u64)>,
}

/// Pages taken for a root, so that two of them are aligned to their size.
const ROOT_ALLOCATION: u64 = VM_ROOT_PAGES * 2;

impl RawVm {
    /// Makes a VM.
    pub fn new(deed: &Deed, flags: VmFlags) -> Result<Self, Failure> {
        Self::over(deed, flags, |_| Ok(()))
    }

    /// Makes a VM, and does something with the first page of its root before.
    pub fn over(
        deed: &Deed,
        flags: VmFlags,
        before: impl FnOnce(u64) -> Result<(), Failure>,
    ) -> Result<Self, Failure> {
        let root = deed.alloc(ROOT_ALLOCATION)?;
        before(root.next_multiple_of(VM_ROOT_PAGES))?;
        let mut lent = Vec::new();
        let call = HostCall::VmCreate { flags, root: root.next_multiple_of(VM_ROOT_PAGES) };
        let [word, ..] = succeed(deed, call, &mut lent)?;
        let handle = VmHandle::from_word(word).ok_or_else(|| failure!("{word:#x} is no handle"))?;
        Ok(Self { handle, root, lent })
    }

    /// Makes a protected VM.
    pub fn protected(deed: &Deed) -> Result<Self, Failure> {
        Self::new(deed, VmFlags { protected: true, ..VmFlags::default() })
    }

    /// Its handle.
    pub fn handle(&self) -> VmHandle {
        self.handle
    }

    /// First page of its root.
    pub fn root(&self) -> u64 {
        self.root.next_multiple_of(VM_ROOT_PAGES)
    }

    /// Makes its next vCPU.
    pub fn vcpu(&mut self, deed: &Deed, vcpu: u64) -> Result<(), Failure> {
        succeed(deed, HostCall::VcpuCreate { vm: self.handle, vcpu }, &mut self.lent).map(drop)
    }

    /// A call for this VM that must succeed, with pages for its tables.
    pub fn must(&mut self, deed: &Deed, call: HostCall) -> Result<(), Failure> {
        succeed(deed, call, &mut self.lent).map(drop)
    }

    /// The same for a call on a range; returns the pages done.
    pub fn done(&mut self, deed: &Deed, call: HostCall) -> Result<u64, Failure> {
        let [done, ..] = succeed(deed, call, &mut self.lent)?;
        if done == 0 { Err(failure!("{call:?} does nothing")) } else { Ok(done) }
    }

    /// Gives pages for its tables.
    pub fn give_tables(&mut self, deed: &Deed, pages: u64) -> Result<(), Failure> {
        let pfn = deed.alloc(pages)?;
        self.lent.push((pfn, pages));
        deed.must(HostCall::VmTopUp { vm: self.handle, pfn, pages }).map(drop)
    }

    /// Ends the teardown, which has begun and in which no page is left; gives its pages back to the kernel.
    pub fn finish(self, deed: &Deed) -> Result<(), Failure> {
        for _ in 0..1024 {
            let [_, left, ..] = deed.must(HostCall::VmTeardownFinish { vm: self.handle })?;
            if left == 0 {
                for (pfn, pages) in &self.lent {
                    deed.free(*pfn, *pages)?;
                }
                return deed.free(self.root, ROOT_ALLOCATION);
            }
        }
        Err(failure!("the teardown of {:?} does not end", self.handle))
    }

    /// Ends a VM that owns no page, from its life to the end of its teardown.
    pub fn end(self, deed: &Deed) -> Result<(), Failure> {
        deed.must(HostCall::VmTeardownStart { vm: self.handle })?;
        self.finish(deed)
    }
}

fn succeed(
    deed: &Deed,
    call: HostCall,
    lent: &mut Vec<(u64, u64)>,
) -> Result<[u64; abi::host::RESULT_WORDS - 2], Failure> {
    let result = deed.with_top_up(call, lent)?;
    match result.outcome {
        Ok(()) => Ok(result.values),
        Err(error) => Err(failure!("{call:?}: {error}")),
    }
}
