//! A VM with memory, a guest's image and the device that the guest talks to.

use alloc::vec::Vec;

use guest_stub::protocol::{Command, DATA_WORDS, DEVICE_BASE, PAGE_SIZE, RAM_BASE, RAM_SIZE};

use crate::device::Device;
use crate::kvm::{Exit, Kvm, Vcpu, Vm};
use crate::steps::Steps;
use crate::sys::{File, Mapping};
use crate::uapi::kvm;
use crate::{Failure, failure};

/// What the `secret` guest makes its secret from, of the program's arguments: `secret-nonce=HEX`, or a number that is no
/// secret.
pub fn secret_nonce(arguments: &[&str]) -> Result<u64, Failure> {
    match arguments.iter().find_map(|argument| argument.strip_prefix("secret-nonce=")) {
        Some(digits) => u64::from_str_radix(digits, 16).map_err(|_| failure!("`{digits}` is no nonce")),
        None => Ok(0x5eed),
    }
}

/// What a machine is made of.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Machine type.
    pub machine_type: u64,
    /// Name of the guest's image, without folder and suffix.
    pub image: &'a str,
    /// The guest's x0.
    pub argument: u64,
    /// Number of vCPUs; all but the first wait to be turned on.
    pub vcpus: u64,
    /// What the device provides.
    pub values: &'a [u64],
}

impl<'a> Options<'a> {
    /// A protected VM with one vCPU.
    pub fn protected(image: &'a str, argument: u64) -> Self {
        Self { machine_type: kvm::VM_TYPE_PROTECTED, image, argument, vcpus: 1, values: &[] }
    }
}

/// What the guest did that its VMM must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It rang for a phase, with these data words.
    Phase([u64; DATA_WORDS]),
    /// It turned itself off.
    Off,
    /// It asked for a reset.
    Reset,
    /// It gave up; the reason has been printed and counted as a failed step.
    GaveUp,
    /// Another exit, which this VMM does not serve.
    Exit(Exit),
}

impl core::fmt::Display for Event {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Phase([phase, ..]) => write!(f, "phase {phase}"),
            Self::Off => f.write_str("off"),
            Self::Reset => f.write_str("reset"),
            Self::GaveUp => f.write_str("gave up"),
            Self::Exit(exit) => write!(f, "{exit:x?}"),
        }
    }
}

/// A VM. Fields are dropped in this order: vCPUs, mapping, memory, VM.
#[derive(Debug)]
pub struct Machine {
    vcpus: Vec<Vcpu>,
    devices: Vec<Device>,
    mapping: Mapping,
    memory: File,
    vm: Vm,
    interruptions: u64,
}

impl Machine {
    /// Makes a VM with its memory, writes the guest's image into it, binds it and makes the vCPUs.
    pub fn new(options: &Options<'_>) -> Result<Self, Failure> {
        let kvm = Kvm::open()?;
        let vm = kvm.create_vm(options.machine_type)?;
        let (memory, mapping) = Self::memory(&vm)?;
        Self::load(&mapping, options.image)?;
        vm.bind(0, &memory, &mapping, RAM_BASE, RAM_SIZE)?;
        Self::assemble(&kvm, vm, memory, mapping, options)
    }

    /// Makes the guest_memfd and maps it.
    pub fn memory(vm: &Vm) -> Result<(File, Mapping), Failure> {
        let flags = kvm::GUEST_MEMFD_FLAG_MMAP | kvm::GUEST_MEMFD_FLAG_INIT_SHARED;
        let memory = vm.create_guest_memfd(RAM_SIZE, flags)?;
        let mapping = memory.map(RAM_SIZE)?;
        Ok((memory, mapping))
    }

    /// Writes a guest's image through the mapping; returns the image.
    pub fn load(mapping: &Mapping, image: &str) -> Result<Vec<u8>, Failure> {
        let path = crate::steps::format(format_args!("/guests/{image}.bin"));
        let bytes = File::open(&path)?.read_all()?;
        if bytes.len() as u64 > RAM_SIZE {
            return Err(failure!("the guest's image has {} bytes, its RAM {RAM_SIZE}", bytes.len()));
        }
        mapping.write(&bytes).map_err(|signal| failure!("writing the image: {signal}"))?;
        Ok(bytes)
    }

    /// Makes the vCPUs of a VM whose memory is bound.
    pub fn assemble(
        kvm: &Kvm,
        vm: Vm,
        memory: File,
        mapping: Mapping,
        options: &Options<'_>,
    ) -> Result<Self, Failure> {
        let mut vcpus = Vec::new();
        let mut devices = Vec::new();
        for index in 0..options.vcpus {
            vcpus.push(vm.create_vcpu(kvm, index, index != 0)?);
            devices.push(Device::new(options.values));
        }
        let boot = vcpus.first().ok_or_else(|| failure!("a machine without vCPU"))?;
        boot.set_register(kvm::REG_PC, RAM_BASE)?;
        boot.set_register(kvm::REG_X0, options.argument)?;
        Ok(Self { vcpus, devices, mapping, memory, vm, interruptions: 0 })
    }

    /// The VM.
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Its guest_memfd.
    pub fn memory_file(&self) -> &File {
        &self.memory
    }

    /// The VMM's mapping of guest RAM; offsets are guest addresses less [`RAM_BASE`].
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// A vCPU.
    pub fn vcpu(&self, index: usize) -> Result<&Vcpu, Failure> {
        self.vcpus.get(index).ok_or_else(|| failure!("there is no vCPU {index}"))
    }

    /// A vCPU's device.
    pub fn device(&self, index: usize) -> Result<&Device, Failure> {
        self.devices.get(index).ok_or_else(|| failure!("there is no vCPU {index}"))
    }

    /// How often a run came back for an interrupt of the host's.
    pub fn interruptions(&self) -> u64 {
        self.interruptions
    }

    /// Runs a vCPU and serves its device until something happens that the caller must know. Steps that the
    /// guest has checked are counted, what it says is printed.
    pub fn run(&mut self, index: usize, steps: &mut Steps) -> Result<Event, Failure> {
        loop {
            let exit = self.vcpu(index)?.run();
            match exit {
                Exit::Mmio { address, length, write, value } => {
                    let Some(offset) = address.checked_sub(DEVICE_BASE).filter(|at| *at < PAGE_SIZE) else {
                        return Ok(Event::Exit(exit));
                    };
                    if let Some(event) =
                        self.device_access(index, offset, length, write.then_some(value), steps)?
                    {
                        return Ok(event);
                    }
                }
                Exit::SystemEvent(kvm::SYSTEM_EVENT_SHUTDOWN) => return Ok(Event::Off),
                Exit::SystemEvent(kvm::SYSTEM_EVENT_RESET) => return Ok(Event::Reset),
                Exit::Interrupted => {
                    self.interruptions += 1;
                    return Ok(Event::Exit(exit));
                }
                _ => return Ok(Event::Exit(exit)),
            }
        }
    }

    /// Runs a vCPU until a phase; interruptions are passed over, anything else is a failure.
    pub fn run_to_phase(&mut self, steps: &mut Steps) -> Result<[u64; DATA_WORDS], Failure> {
        loop {
            match self.run(0, steps)? {
                Event::Phase(data) => return Ok(data),
                Event::Exit(Exit::Interrupted) => {}
                other => return Err(failure!("the guest should reach its next phase, but: {other}")),
            }
        }
    }

    /// Runs a vCPU until it is off, passing over phases and interruptions.
    pub fn run_to_end(&mut self, steps: &mut Steps) -> Result<Event, Failure> {
        loop {
            match self.run(0, steps)? {
                Event::Phase(_) | Event::Exit(Exit::Interrupted) => {}
                other => return Ok(other),
            }
        }
    }

    fn device_access(
        &mut self,
        index: usize,
        offset: u64,
        length: usize,
        stored: Option<u64>,
        steps: &mut Steps,
    ) -> Result<Option<Event>, Failure> {
        let device = self.devices.get_mut(index).ok_or_else(|| failure!("there is no vCPU {index}"))?;
        let Some(value) = stored else {
            let value = device.load(offset, length);
            self.vcpu(index)?.complete_load(value)?;
            return Ok(None);
        };
        let Some(doorbell) = device.store(offset, length, value) else { return Ok(None) };
        let [first, second, ..] = doorbell.data;
        Ok(match doorbell.command {
            Some(Command::Phase) => Some(Event::Phase(doorbell.data)),
            Some(Command::Say) => {
                steps.tell(format_args!("  guest: {}", doorbell.text));
                None
            }
            Some(Command::Check) => {
                steps.equal_hex(&doorbell.text, first, second);
                None
            }
            Some(Command::Row) => {
                let [least, sum, runs, ..] = doorbell.data;
                steps.row(&doorbell.text, least, sum, runs);
                None
            }
            Some(Command::Panic) => {
                steps.check("guest-goes-on", "yes", &doorbell.text, false);
                Some(Event::GaveUp)
            }
            None => {
                steps.check("guest-rings-with-a-command", "a command", crate::steps::Hex(value), false);
                Some(Event::GaveUp)
            }
        })
    }
}
