//! For tests on the build machine: a fake machine, and a small world with a VM in it.

mod machine;

pub(crate) use machine::{Event, FakeMachine};

use alloc::rc::Rc;
use alloc::vec::Vec;
use core::ops::Range;

use crate::errno::Errno;
use crate::gmem::fallocate::MapsContent;
use crate::gmem::{Inode, View};
use crate::host::Host;
use crate::kernel::{release_file, release_unmapped};
use crate::kvm::memory::{Caller, give_page};
use crate::kvm::run::{self, Step};
use crate::kvm::slots::{Descriptor, GUEST_MEMFD, RegionRequest, set_region};
use crate::kvm::vm::TYPE_PROTECTED;
use crate::kvm::{VcpuRef, Vm};
use crate::mm::space::{Access, MMAP_BASE};
use crate::mm::{AddressSpace, Backing, PAGE, Pfn, Prot};

/// Notes what it is told to unmap.
#[derive(Default)]
pub(crate) struct Unmappings {
    pub(crate) ranges: Vec<Range<u64>>,
}

impl MapsContent for Unmappings {
    fn unmap_content(&mut self, _: &mut Host, _: &Rc<Inode>, pages: &Range<u64>) {
        self.ranges.push(pages.clone());
    }
}

/// A program's memory without the program.
pub(crate) struct TestCaller {
    pub(crate) space: AddressSpace,
}

impl MapsContent for TestCaller {
    fn unmap_content(&mut self, host: &mut Host, inode: &Rc<Inode>, pages: &Range<u64>) {
        self.space.unmap_content(host, inode, pages);
    }
}

impl Caller for TestCaller {
    fn frame_at(&mut self, host: &mut Host, address: u64, access: Access) -> Result<Pfn, Errno> {
        Ok(self.space.resolve(host, address, access)?)
    }

    fn is_single_threaded(&self) -> bool {
        true
    }
}

/// A protected VM with a guest_memfd of both flags, bound at [`World::IPA`] and mapped at [`World::VA`], and
/// one vCPU.
pub(crate) struct World<'m> {
    pub(crate) host: Host<'m>,
    pub(crate) vm: Rc<Vm>,
    /// The program's descriptor of the guest_memfd, until it is closed.
    pub(crate) view: Option<Rc<View>>,
    pub(crate) vcpu: VcpuRef,
    pub(crate) caller: TestCaller,
}

impl<'m> World<'m> {
    pub(crate) const IPA: u64 = 0x8000_0000;
    pub(crate) const VA: u64 = MMAP_BASE;

    pub(crate) fn new(machine: &'m FakeMachine, pages: u64) -> Self {
        Self::of_type(machine, pages, TYPE_PROTECTED)
    }

    pub(crate) fn of_type(machine: &'m FakeMachine, pages: u64, machine_type: u64) -> Self {
        let mut host = machine.host();
        let vm = Rc::new(Vm::new(&mut host, machine_type).unwrap());
        let inode = Rc::new(Inode::new(&mut host, pages * PAGE, 3).unwrap());
        let view = Rc::new(View::new(inode, vm.clone()));
        let request = RegionRequest {
            flags: GUEST_MEMFD,
            guest_phys_addr: Self::IPA,
            memory_size: pages * PAGE,
            ..RegionRequest::default()
        };
        set_region(&vm, &request, true, &|_| Descriptor::Gmem(view.clone())).unwrap();
        vm.create_vcpu(&mut host, 0).unwrap();
        let vcpu = VcpuRef::new(&vm, 0).unwrap();
        vcpu.with(|vcpu| vcpu.initialised.set(true)).unwrap();
        let mut space = AddressSpace::new(&mut host, 1).unwrap();
        let backing = Backing::Content { view: view.clone(), first: 0 };
        space.map(Self::VA..Self::VA + pages * PAGE, Prot::READ | Prot::WRITE, backing).unwrap();
        Self { host, vm, view: Some(view), vcpu, caller: TestCaller { space } }
    }

    /// The open file.
    pub(crate) fn view(&self) -> &Rc<View> {
        self.view.as_ref().unwrap()
    }

    /// Its inode.
    pub(crate) fn inode(&self) -> &Rc<Inode> {
        self.view().inode()
    }

    /// The program closes and unmaps the guest_memfd.
    pub(crate) fn close_file(&mut self) {
        let all = Self::VA..Self::VA + self.inode().size();
        let unmapped = self.caller.space.unmap(&mut self.host, &all);
        release_unmapped(&mut self.host, Vec::new(), unmapped);
        let view = self.view.take().unwrap();
        release_file(&mut self.host, Rc::new(crate::fs::File::Gmem(view)));
    }

    /// The guest touches every page of its memory.
    pub(crate) fn give_all_pages(&mut self) {
        for page in 0..self.inode().pages() {
            give_page(&mut self.host, &mut self.caller, &self.vm, Self::IPA + page * PAGE).unwrap();
        }
    }

    /// The program touches a page of its mapping.
    pub(crate) fn touch(&mut self, page: u64) -> Result<Pfn, crate::mm::Fault> {
        self.caller.space.fault_in(&mut self.host, Self::VA + page * PAGE, Access::Write)
    }

    pub(crate) fn run(&mut self) -> Result<u64, Errno> {
        let mut entry = run::begin(&mut self.host, &mut self.caller, &self.vcpu)?;
        loop {
            let result = self.host.machine.call(entry.call());
            entry = match entry.end(&mut self.host, &mut self.caller, result) {
                Step::Enter(entry) | Step::Yield(entry) => entry,
                Step::Wait(entry) => {
                    self.host.machine.idle();
                    entry
                }
                Step::Off(_) => return Err(Errno::EAGAIN),
                Step::Return(result) => return result,
            };
        }
    }

    /// The `u32` at an offset of the vCPU's `kvm_run`.
    pub(crate) fn run_word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.host.machine.read(self.vcpu.run_page().address() + offset, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// The frame of a page of content.
    pub(crate) fn frame(&self, page: u64) -> Pfn {
        self.inode().page(page).unwrap().frame
    }

    /// Closes all that the program has.
    pub(crate) fn close_everything(self) -> Host<'m> {
        use crate::fs::File;
        let Self { mut host, vm, view, vcpu, caller } = self;
        release_file(&mut host, Rc::new(File::Vm(vm)));
        release_file(&mut host, Rc::new(File::Vcpu(vcpu)));
        if let Some(view) = view {
            release_file(&mut host, Rc::new(File::Gmem(view)));
        }
        let unmapped = caller.space.destroy(&mut host);
        release_unmapped(&mut host, Vec::new(), unmapped);
        host
    }
}
