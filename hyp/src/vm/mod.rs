//! Virtual machines: what a VM is, and its life from creation to the end of teardown.
//!
//! | file | what it owns |
//! |---|---|
//! | `table` | the table of VMs |
//! | `claim` | a vCPU taken by a CPU |
//! | [`context`] | a vCPU's registers, and why it stopped |
//! | [`vcpu`] | a vCPU's record |
//! | [`run`] | running a vCPU until its next exit |
//! | `trap` | what follows from a trap |
//! | [`guest_call`] | the calls of a guest |
//! | [`power`] | a guest's PSCI |
//! | [`sysreg`] | trapped system registers |
//! | [`inject`] | exceptions that EL2 delivers to a guest |
//! | [`mmio`] | accesses to devices |
//!
//! A VM is guarded by the lock of its slot (`table`), a claimed vCPU's record by its claim (`claim`).

#![forbid(unsafe_code)]

mod claim;
pub mod context;
pub mod guest_call;
pub mod inject;
pub mod mmio;
pub mod power;
pub mod run;
pub mod sysreg;
mod table;
#[cfg(test)]
mod testing;
mod trap;
pub mod vcpu;

pub use claim::Claim;
pub use table::{VmGuard, Vms};

use crate::addr::{Pages, Pfn};
use crate::machine::{Machine, Stage2Id};
use crate::ownership::guest::GuestSpace;
use crate::pool::records::{Record, Records};
use abi::{Error, VmFlags, VmHandle};
use power::{Outcome, Power, Start};
use vcpu::{Residency, Vcpu};

/// VMs at a time. A VMID is the slot's number plus one and must fit 8 bits, 0 being the host's.
pub const MAX_VMS: usize = 255;
/// vCPUs of a VM.
pub const MAX_VCPUS: usize = 8;

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It may run.
    Live,
    /// Its teardown has begun: nothing of it runs, its pages go back.
    Dying,
}

/// A vCPU as its VM sees it.
#[derive(Debug)]
enum VcpuSlot {
    Absent,
    Idle(Record<Vcpu>),
    /// Some CPU has claimed it.
    Claimed,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    pub(crate) flags: VmFlags,
    pub(crate) space: GuestSpace,
    pub(crate) phase: Phase,
    /// The guest has called `MMIO_GUARD_ENROLL`.
    pub(crate) guarded: bool,
    /// The host gave these pages, root included, and gets them back.
    pub(crate) given: u64,
    /// Which vCPU last ran on each CPU.
    pub(crate) residency: Residency,
    /// Power states of the vCPUs, by index.
    pub(crate) power: [Power; MAX_VCPUS],
    /// Where those start that are pending; zero otherwise.
    pub(crate) starts: [Start; MAX_VCPUS],
    vcpus: [VcpuSlot; MAX_VCPUS],
    /// vCPUs that exist: those with a lower index.
    created: usize,
    claimed: usize,
    /// Teardown has dropped the VM's translations.
    flushed: bool,
}

impl Vm {
    /// A VM without memory or vCPUs, over an empty root.
    pub fn new(flags: VmFlags, space: GuestSpace) -> Self {
        Self {
            flags,
            given: space.table.root_pages(),
            space,
            phase: Phase::Live,
            guarded: false,
            residency: Residency::new(),
            power: [Power::Off; MAX_VCPUS],
            starts: [Start::default(); MAX_VCPUS],
            vcpus: [const { VcpuSlot::Absent }; MAX_VCPUS],
            created: 0,
            claimed: 0,
            flushed: false,
        }
    }

    /// Its name.
    pub fn handle(&self) -> VmHandle {
        self.space.handle
    }

    /// Its translation.
    pub fn id(&self) -> Stage2Id {
        Stage2Id { vmid: vmid(self.handle()), root: self.space.table.root() }
    }

    /// Whether it may change hands of pages: it is alive.
    pub(crate) fn check_live(&self) -> Result<(), Error> {
        if self.phase == Phase::Live { Ok(()) } else { Err(Error::Permission) }
    }

    /// Whether a CPU has claimed a vCPU of it.
    pub(crate) fn is_claimed(&self) -> bool {
        self.claimed > 0
    }

    /// Whether it may get table pages: until its end has begun to take the tables apart. A dying VM may need
    /// some, to give back one page of a block.
    pub(crate) fn is_growable(&self) -> bool {
        !self.flushed
    }

    /// Adds a vCPU. They are made in the order of their indices.
    pub(crate) fn add_vcpu(&mut self, records: &Records, index: u64) -> Result<(), VcpuError> {
        self.check_live()?;
        let at = usize::try_from(index).map_err(|_| Error::Invalid)?;
        if at < self.created {
            return Err(Error::Exists.into());
        }
        if at != self.created {
            return Err(Error::Invalid.into());
        }
        let slot = self.vcpus.get_mut(at).ok_or(Error::Invalid)?;
        let record = records.alloc(Vcpu::new(index, self.flags)).map_err(VcpuError::Lacking)?;
        *slot = VcpuSlot::Idle(record);
        self.created = at.saturating_add(1);
        Ok(())
    }

    /// Its vCPUs, up to the first that a CPU has claimed.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn idle_vcpus(&self) -> impl Iterator<Item = &Vcpu> {
        self.vcpus.iter().map_while(|slot| match slot {
            VcpuSlot::Idle(record) => Some(&**record),
            VcpuSlot::Absent | VcpuSlot::Claimed => None,
        })
    }

    /// Zeroes the registers of all its vCPUs, those that they were to start with included, in memory too.
    pub(crate) fn forget_registers<M: Machine>(&mut self, machine: &M) {
        for slot in &mut self.vcpus {
            if let VcpuSlot::Idle(record) = slot {
                record.context = context::Context::default();
                machine.clean_record(core::ptr::from_ref(&**record).cast(), size_of::<Vcpu>());
            }
        }
        self.forget_starts(machine);
    }

    /// Serves a PSCI call of vCPU `caller`, and keeps where a vCPU starts that it turns on.
    // It has one caller; called for itself it costs 136 bytes more.
    #[inline(always)]
    pub(crate) fn serve_psci(
        &mut self,
        function: u32,
        arguments: [u64; 3],
        caller: usize,
    ) -> Option<Outcome> {
        let states = self.power.get_mut(..self.created).unwrap_or_default();
        let outcome = power::call(function, arguments, caller, states);
        if let Some(Outcome::TurnedOn(target, start)) = outcome
            && let Some(place) = self.starts.get_mut(target as usize)
        {
            *place = start;
        }
        outcome
    }

    /// Takes where a vCPU starts that was pending.
    pub(crate) fn take_start(&mut self, index: usize) -> Start {
        self.starts.get_mut(index).map(core::mem::take).unwrap_or_default()
    }

    /// Zeroes what vCPUs were to start with, in memory too.
    fn forget_starts<M: Machine>(&mut self, machine: &M) {
        self.starts = Default::default();
        machine.clean_record(self.starts.as_ptr().cast(), size_of_val(&self.starts));
    }

    /// Begins the end. No vCPU starts any more.
    pub(crate) fn start_teardown<M: Machine>(&mut self, machine: &M) -> Result<(), Error> {
        self.check_live()?;
        if self.claimed > 0 {
            return Err(Error::Busy);
        }
        self.phase = Phase::Dying;
        self.forget_starts(machine);
        Ok(())
    }

    /// Checks that the VM may end.
    pub(crate) fn check_end(&self) -> Result<(), Error> {
        if self.phase != Phase::Dying {
            return Err(Error::Permission);
        }
        if self.space.pages > 0 {
            return Err(Error::Busy);
        }
        Ok(())
    }

    /// The next pages to give back: one that the pool holds, then a table, at last the root, all of it at once.
    pub(crate) fn next_pages<M: Machine>(&self, machine: &M) -> Option<Pages<Pfn>> {
        let table = &self.space.table;
        match self.space.cache.top().or_else(|| table.lowest_table(machine)) {
            Some(page) => Some(Pages::one(page)),
            None => Pages::new(table.root(), table.root_pages()),
        }
    }

    /// Takes the pages that [`next_pages`](Self::next_pages) has told out of use. The first time, the VM's translations
    /// are dropped, and nothing of it grows any more. The root is out of use then.
    pub(crate) fn release_pages<M: Machine>(&mut self, machine: &M, pages: Pages<Pfn>) {
        if !self.flushed {
            machine.retire_stage2(self.id());
            self.flushed = true;
        }
        let released = self.space.cache.pop(machine).or_else(|| self.space.table.unlink_table(machine));
        if pages.start() != released.unwrap_or(self.space.table.root()) {
            crate::broken("a page goes back that is still in use");
        }
    }
}

/// Why a vCPU was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum VcpuError {
    Refused(Error),
    Lacking(crate::pool::Lacking),
}

impl From<Error> for VcpuError {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// VMID of a VM.
pub(crate) fn vmid(handle: VmHandle) -> u16 {
    u16::from(handle.slot()).saturating_add(1)
}

/// Checks that a host gave a root that can be one: aligned to its own size.
pub(crate) fn root_pages(first: u64) -> Result<Pages<Pfn>, Error> {
    let count = abi::host::VM_ROOT_PAGES;
    let pages = Pages::<Pfn>::from_raw(first, count).ok_or(Error::Invalid)?;
    if pages.start().as_u64() % count == 0 { Ok(pages) } else { Err(Error::Invalid) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::World;
    use abi::host::HostCall;

    #[test]
    fn a_root_that_is_not_aligned_to_its_size_is_refused() {
        assert_eq!(root_pages(7), Err(Error::Invalid));
        assert_eq!(root_pages(u64::MAX), Err(Error::Invalid));
        assert_eq!(root_pages(8).map(|pages| pages.count()), Ok(2));
    }

    #[test]
    fn registers_are_gone_before_the_machine_is_turned_off() {
        let world = World::new();
        let vm = world.vm(abi::VmFlags::default(), 0x1000, 8);
        world.ok(HostCall::VcpuCreate { vm, vcpu: 0 });
        world.ok(HostCall::VcpuSetReg { vm, vcpu: 0, register: 3, value: 0x5ec2e7 });
        let register = || match &world.hyp.vms.lock(vm).unwrap().vcpus[..] {
            [VcpuSlot::Idle(vcpu), ..] => vcpu.context.x[3],
            _ => panic!("the vCPU is idle"),
        };
        assert_eq!(register(), 0x5ec2e7);
        world.hyp.machine().take_cleaned();
        world.hyp.wipe_all_guests();
        assert_eq!(register(), 0);
        assert_eq!(world.hyp.machine().take_cleaned(), [size_of::<Vcpu>(), size_of::<[Start; MAX_VCPUS]>()]);
    }

    #[test]
    fn the_host_and_every_vm_have_vmids_of_their_own_in_8_bits() {
        let last = VmHandle::new(MAX_VMS as u8 - 1, 1).unwrap();
        assert_eq!(vmid(last), 255);
        assert_eq!(vmid(VmHandle::new(0, 1).unwrap()), 1);
    }
}
