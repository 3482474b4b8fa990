//! Each transition of ownership with the locks that it takes, in the order `host`, `hyp`, VM, and with the
//! kind and phase of the VM that it is for.
//!
//! Each stays a function of its own in the image too, so that the dispatcher saves and restores little for the
//! cheapest of them.
//!
//! Every function does one chunk and returns its pages: the caller's caller comes again for the rest.

use crate::Hypervisor;
use crate::addr::{Gfn, Pages, Pfn};
use crate::machine::Machine;
use crate::ownership::donate::{self, Draw};
use crate::ownership::guest::{self, GuestSpace};
use crate::ownership::query::GuestPage;
use crate::ownership::{Error, Host, HypSpace, reclaim, share};
use crate::vm::{Phase, Vm};
use crate::watch::{Answer, Asked, Held, Watch};
use abi::VmHandle;
use abi::page::{Permissions, Pool};

impl<M: Machine> Hypervisor<M> {
    /// Lends a chunk of the host's pages to the hypervisor.
    #[inline(never)]
    pub fn host_share_hyp(&self, pages: Pages<Pfn>) -> Result<u64, Error> {
        self.with_host_and_hyp(Asked::ShareHyp(pages), |host, hyp| {
            share::host_with_hyp(&self.machine, &self.memory, host, hyp, pages)
        })
    }

    /// Takes a chunk back from the hypervisor.
    #[inline(never)]
    pub fn host_unshare_hyp(&self, pages: Pages<Pfn>) -> Result<u64, Error> {
        self.with_host_and_hyp(Asked::UnshareHyp(pages), |host, hyp| {
            share::host_unshare_hyp(&self.machine, &self.memory, host, hyp, pages)
        })
    }

    /// Pins a page that is shared with the hypervisor.
    pub fn pin(&self, page: Pfn) -> Result<(), Error> {
        let pinned = self.with_host_and_hyp(Asked::Pin(page), |host, hyp| {
            share::pin(&self.machine, &self.memory, host, hyp, page).map(|()| 1)
        });
        pinned.map(|_| ())
    }

    /// Lets go of a pinned page.
    pub fn unpin(&self, page: Pfn) -> Result<(), Error> {
        let unpinned = self.with_host_and_hyp(Asked::Unpin(page), |host, hyp| {
            share::unpin(&self.machine, host, hyp, page).map(|()| 1)
        });
        unpinned.map(|_| ())
    }

    /// Gives a chunk of the host's pages to the hypervisor's pool of tables, or its heap of records.
    #[inline(never)]
    pub fn pool_top_up(&self, pool: Pool, pages: Pages<Pfn>) -> Result<u64, Error> {
        self.with_host_and_hyp(Asked::PoolTopUp(pool, pages), |host, hyp| {
            let draw = match pool {
                Pool::Tables => Draw::Refill,
                Pool::Metadata => Draw::Keep,
                // A VM's pool has a call of its own.
                Pool::Vm => return Err(Error::WrongVm),
            };
            let donation = donate::host_to_hyp(&self.machine, &self.memory, host, hyp, pages, draw)?;
            let pages = donation.commit(&self.machine, host, hyp);
            match draw {
                Draw::Keep => {
                    let Some(start) = self.machine.record_memory(pages) else {
                        crate::broken("a donated page cannot be reached");
                    };
                    crate::hypervisor::add_records(&self.records, start, pages);
                }
                Draw::Refill => host.pool.extend(&self.machine, pages),
            }
            Ok(pages.count())
        })
    }

    /// Gives a chunk of the host's pages to a VM for its tables.
    #[inline(never)]
    pub fn vm_top_up(&self, vm: VmHandle, pages: Pages<Pfn>) -> Result<u64, Error> {
        let mut host = self.host.lock();
        let mut hyp = self.hyp.lock();
        let mut guard = self.vms.lock(vm);
        let held = Held { host: Some(&host), hyp: Some(&hyp), vm: guard.as_deref() };
        let watch = Watch::begin(self, Asked::VmTopUp(vm, pages), held);
        let result = guard.as_deref_mut().ok_or(Error::NoVm).and_then(|vm| {
            if !vm.is_growable() {
                return Err(Error::WrongVm);
            }
            let (machine, memory) = (&self.machine, &self.memory);
            let donation = donate::host_to_hyp(machine, memory, &host, &hyp, pages, Draw::Keep)?;
            let pages = donation.commit(machine, &mut host, &mut hyp);
            vm.space.cache.extend(machine, pages);
            vm.given = vm.given.saturating_add(pages.count());
            Ok(pages.count())
        });
        let held = Held { host: Some(&host), hyp: Some(&hyp), vm: guard.as_deref() };
        watch.end(self, held, Answer::from(&result));
        result
    }

    /// Gives a chunk of the host's pages to a protected guest.
    #[inline(never)]
    pub fn host_donate_guest(&self, vm: VmHandle, pfns: Pages<Pfn>, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(Asked::DonateGuest(vm, pfns, gfns), vm, Want::Protected, |host, guest| {
            donate::host_to_guest(&self.machine, &self.memory, host, guest, pfns, gfns)
        })
    }

    /// Lends a chunk of the host's pages to a guest that is not protected.
    #[inline(never)]
    pub fn host_share_guest(
        &self,
        vm: VmHandle,
        pfns: Pages<Pfn>,
        gfns: Pages<Gfn>,
        permissions: Permissions,
    ) -> Result<u64, Error> {
        self.with_host_and_guest(
            Asked::ShareGuest(vm, pfns, gfns, permissions),
            vm,
            Want::Unprotected,
            |host, guest| {
                share::host_with_guest(&self.machine, &self.memory, host, guest, pfns, gfns, permissions)
            },
        )
    }

    /// Takes a chunk back from a guest that is not protected, alive or dying.
    #[inline(never)]
    pub fn host_unshare_guest(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(
            Asked::UnshareGuest(vm, gfns),
            vm,
            Want::UnprotectedEvenDying,
            |host, guest| share::host_unshare_guest(&self.machine, host, guest, gfns),
        )
    }

    /// Takes a chunk back from a protected guest that is dying.
    #[inline(never)]
    pub fn host_reclaim_guest(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(Asked::ReclaimGuest(vm, gfns), vm, Want::ProtectedDying, |host, guest| {
            reclaim::from_dying(&self.machine, host, guest, gfns)
        })
    }

    /// Takes a chunk of private pages from a protected guest that is alive: the one that the host's table names.
    #[inline(never)]
    pub fn host_force_reclaim(&self, pages: Pages<Pfn>) -> Result<u64, Error> {
        let mut host = self.host.lock();
        let named = reclaim::private_piece(&self.machine, &self.memory, &host, pages);
        let mut guard = named.ok().and_then(|(vm, _)| self.vms.lock(vm));
        let asked = Asked::ForceReclaim(pages, named.ok().map(|(vm, piece)| (vm, piece.gfns)));
        let held = Held { host: Some(&host), hyp: None, vm: guard.as_deref() };
        let watch = Watch::begin(self, asked, held);
        let result = named.and_then(|(_, piece)| {
            let vm = guard.as_deref_mut().ok_or(Error::NoVm)?;
            Want::Protected.check(vm)?;
            reclaim::by_force(&self.machine, &mut host, &mut vm.space, piece)
        });
        let held = Held { host: Some(&host), hyp: None, vm: guard.as_deref() };
        watch.end(self, held, Answer::from(&result));
        result
    }

    /// Shares a chunk of a guest's pages with the host.
    #[inline(never)]
    pub fn guest_share_host(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(Asked::Share(vm, gfns), vm, Want::Protected, |host, guest| {
            guest::share_host(&self.machine, host, guest, gfns)
        })
    }

    /// Takes a chunk of shared pages back from the host.
    #[inline(never)]
    pub fn guest_unshare_host(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(Asked::Unshare(vm, gfns), vm, Want::Protected, |host, guest| {
            guest::unshare_host(&self.machine, host, guest, gfns)
        })
    }

    /// Gives a chunk of a guest's pages back to the host, wiped.
    #[inline(never)]
    pub fn guest_relinquish(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_host_and_guest(Asked::Relinquish(vm, gfns), vm, Want::Protected, |host, guest| {
            guest::relinquish(&self.machine, host, guest, gfns)
        })
    }

    /// Enrols a chunk of a guest's addresses as a device.
    pub fn guard_map(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_guest(Asked::GuardMap(vm, gfns), vm, |guest| guest::guard_map(&self.machine, guest, gfns))
    }

    /// Takes an enrolment back.
    pub fn guard_unmap(&self, vm: VmHandle, gfns: Pages<Gfn>) -> Result<u64, Error> {
        self.with_guest(Asked::GuardUnmap(vm, gfns), vm, |guest| {
            guest::guard_unmap(&self.machine, guest, gfns)
        })
    }

    /// What a guest's table says of a page.
    pub fn guest_page(&self, vm: VmHandle, gfn: Gfn) -> GuestPage {
        let page = self.with_vm(vm, |vm| vm.space.page(&self.machine, gfn));
        page.unwrap_or(GuestPage::Missing)
    }

    pub(crate) fn with_host_and_hyp(
        &self,
        asked: Asked,
        transition: impl FnOnce(&mut Host, &mut HypSpace) -> Result<u64, Error>,
    ) -> Result<u64, Error> {
        self.change_host_and_hyp(&mut self.host.lock(), &mut self.hyp.lock(), asked, transition)
    }

    /// The same for whoever holds both locks.
    pub(crate) fn change_host_and_hyp(
        &self,
        host: &mut Host,
        hyp: &mut HypSpace,
        asked: Asked,
        transition: impl FnOnce(&mut Host, &mut HypSpace) -> Result<u64, Error>,
    ) -> Result<u64, Error> {
        let watch = Watch::begin(self, asked, Held::host_and_hyp(host, hyp));
        let result = transition(host, hyp);
        watch.end(self, Held::host_and_hyp(host, hyp), Answer::from(&result));
        result
    }

    fn with_host_and_guest(
        &self,
        asked: Asked,
        vm: VmHandle,
        want: Want,
        transition: impl FnOnce(&mut Host, &mut GuestSpace) -> Result<u64, Error>,
    ) -> Result<u64, Error> {
        let mut host = self.host.lock();
        let mut guard = self.vms.lock(vm);
        let held = Held { host: Some(&host), hyp: None, vm: guard.as_deref() };
        let watch = Watch::begin(self, asked, held);
        let result = guard.as_deref_mut().ok_or(Error::NoVm).and_then(|vm| {
            want.check(vm)?;
            transition(&mut host, &mut vm.space)
        });
        let held = Held { host: Some(&host), hyp: None, vm: guard.as_deref() };
        watch.end(self, held, Answer::from(&result));
        result
    }

    fn with_guest(
        &self,
        asked: Asked,
        vm: VmHandle,
        transition: impl FnOnce(&mut GuestSpace) -> Result<u64, Error>,
    ) -> Result<u64, Error> {
        let mut guard = self.vms.lock(vm);
        let watch = Watch::begin(self, asked, Held::only_vm(guard.as_deref()));
        let result = guard.as_deref_mut().ok_or(Error::NoVm).and_then(|vm| {
            Want::Protected.check(vm)?;
            transition(&mut vm.space)
        });
        watch.end(self, Held::only_vm(guard.as_deref()), Answer::from(&result));
        result
    }
}

/// The kind and phase of a VM that a transition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Protected,
    ProtectedDying,
    Unprotected,
    UnprotectedEvenDying,
}

impl Want {
    fn check(self, vm: &Vm) -> Result<(), Error> {
        let live = vm.phase == Phase::Live;
        let fits = match self {
            Self::Protected => vm.flags.protected && live,
            Self::ProtectedDying => vm.flags.protected && !live,
            Self::Unprotected => !vm.flags.protected && live,
            Self::UnprotectedEvenDying => !vm.flags.protected,
        };
        if fits { Ok(()) } else { Err(Error::WrongVm) }
    }
}
