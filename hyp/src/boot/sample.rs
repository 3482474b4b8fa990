//! Device trees for tests, built from nothing, like those of QEMU's `virt` machine with guest-loader.

use super::image::{self, HEADER_SIZE};
use super::plan::{Plan, Problem, plan};
use super::region::Region;

/// Where the tree of a sample lies.
pub(super) const TREE: u64 = 0x4800_0000;
/// The hypervisor's image.
pub(super) const DEED: (u64, u64) = (0x4020_0000, 0x10_0000);
/// The host's kernel: its file, and what its header asks for.
pub(super) const HOST: (u64, u64) = (0x4200_0000, 0x10_0000);
pub(super) const HOST_IMAGE_SIZE: u64 = 0x30_0000;
/// The ramdisk.
pub(super) const RAMDISK: (u64, u64) = (0x4810_0000, 0x1234);
/// The interrupt of EL1's physical timer: PPI 14, level, low.
pub(super) const PHYSICAL_TIMER: [u8; 12] = [0, 0, 0, 1, 0, 0, 0, 14, 0, 0, 0, 4];

/// A flattened tree under construction.
#[derive(Default)]
pub(super) struct Builder {
    structure: Vec<u8>,
    strings: Vec<u8>,
    pub(super) reservations: Vec<(u64, u64)>,
}

impl Builder {
    fn word(&mut self, word: u32) {
        self.structure.extend(word.to_be_bytes());
    }

    fn pad(&mut self) {
        self.structure.resize(self.structure.len().next_multiple_of(4), 0);
    }

    pub(super) fn begin(&mut self, name: &str) -> &mut Self {
        self.word(1);
        self.structure.extend(name.bytes().chain([0]));
        self.pad();
        self
    }

    pub(super) fn end(&mut self) -> &mut Self {
        self.word(2);
        self
    }

    pub(super) fn property(&mut self, name: &str, value: &[u8]) -> &mut Self {
        let known = self.strings.split(|byte| *byte == 0).scan(0, |at, text| {
            let start = *at;
            *at += text.len() + 1;
            Some((start, text == name.as_bytes()))
        });
        let offset = known.filter(|(_, same)| *same).map(|(start, _)| start).next();
        let offset = offset.unwrap_or_else(|| {
            let start = self.strings.len();
            self.strings.extend(name.bytes().chain([0]));
            start
        });
        self.word(3);
        self.word(value.len() as u32);
        self.word(offset as u32);
        self.structure.extend(value);
        self.pad();
        self
    }

    pub(super) fn text(&mut self, name: &str, value: &str) -> &mut Self {
        let value: Vec<u8> = value.bytes().chain([0]).collect();
        self.property(name, &value)
    }

    pub(super) fn cells(&mut self, name: &str, cells: &[u32]) -> &mut Self {
        let value: Vec<u8> = cells.iter().flat_map(|cell| cell.to_be_bytes()).collect();
        self.property(name, &value)
    }

    /// A `reg` of 64-bit address and size.
    pub(super) fn reg(&mut self, (start, size): (u64, u64)) -> &mut Self {
        let value: Vec<u8> = [start, size].iter().flat_map(|value| value.to_be_bytes()).collect();
        self.property("reg", &value)
    }

    /// The blob, with room up to `total` bytes behind it.
    pub(super) fn finish(mut self, total: usize) -> Vec<u8> {
        self.word(9);
        let mut reservations = self.reservations;
        reservations.push((0, 0));
        let structure = 40 + 16 * reservations.len();
        let strings = structure + self.structure.len();
        let used = strings + self.strings.len();
        let header = [
            0xd00d_feed,
            total.max(used) as u32,
            structure as u32,
            strings as u32,
            40,
            17,
            16,
            0,
            self.strings.len() as u32,
            self.structure.len() as u32,
        ];
        let mut blob: Vec<u8> = header.iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
        blob.extend(
            reservations.iter().flat_map(|(at, size)| [at.to_be_bytes(), size.to_be_bytes()].concat()),
        );
        blob.extend(self.structure);
        blob.extend(self.strings);
        blob.resize(total.max(used), 0);
        blob
    }
}

/// A machine to boot: change a field to change the story.
pub(super) struct Sample {
    pub(super) ram: Vec<(u64, u64)>,
    pub(super) reservations: Vec<(u64, u64)>,
    pub(super) reserved: Vec<((u64, u64), bool)>,
    pub(super) modules: Vec<(&'static str, (u64, u64), Option<&'static str>)>,
    pub(super) arguments: &'static str,
    pub(super) cpus: Vec<u64>,
    pub(super) timer_names: Option<&'static str>,
    pub(super) smmu: bool,
    pub(super) image_size: u64,
    pub(super) total: usize,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            ram: vec![(0x4000_0000, 0x4000_0000)],
            reservations: vec![],
            reserved: vec![],
            modules: vec![
                ("multiboot,ramdisk", RAMDISK, None),
                ("multiboot,kernel", HOST, Some("console=ttyAMA0 quiet")),
            ],
            arguments: "deed.nonce=00c0ffee",
            cpus: vec![0, 1],
            timer_names: None,
            smmu: false,
            image_size: HOST_IMAGE_SIZE,
            total: 0x10_0000,
        }
    }
}

impl Sample {
    pub(super) fn blob(&self) -> Vec<u8> {
        let mut b = Builder { reservations: self.reservations.clone(), ..Builder::default() };
        b.begin("").cells("interrupt-parent", &[7]).cells("#address-cells", &[2]).cells("#size-cells", &[2]);
        for ram in &self.ram {
            b.begin(&format!("memory@{:x}", ram.0)).text("device_type", "memory").reg(*ram).end();
        }
        let wide = self.cpus.iter().any(|cpu| cpu >> 32 != 0);
        b.begin("cpus").cells("#address-cells", &[1 + u32::from(wide)]).cells("#size-cells", &[0]);
        b.begin("cpu-map").end();
        for cpu in &self.cpus {
            b.begin(&format!("cpu@{cpu:x}")).text("device_type", "cpu");
            let bytes = cpu.to_be_bytes();
            b.property("reg", if wide { &bytes } else { &bytes[4..] }).end();
        }
        b.end();
        b.begin("fw-cfg@9020000").text("compatible", "qemu,fw-cfg-mmio").reg((0x902_0000, 0x18)).end();
        if self.smmu {
            b.begin("smmuv3@9050000").text("compatible", "arm,smmu-v3").reg((0x905_0000, 0x2_0000)).end();
        }
        b.begin("pcie@10000000").text("device_type", "pci").cells("iommu-map", &[0, 8, 0, 0x1_0000]).end();
        b.begin("intc@8000000").cells("phandle", &[7]).cells("#interrupt-cells", &[3]).end();
        b.begin("timer").text("compatible", "arm,armv8-timer\0arm,armv7-timer").property("always-on", &[]);
        b.cells("interrupts", &[1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4]);
        if let Some(names) = self.timer_names {
            b.text("interrupt-names", names);
        }
        b.end();
        if !self.reserved.is_empty() {
            b.begin("reserved-memory").cells("#address-cells", &[2]).cells("#size-cells", &[2]);
            b.property("ranges", &[]);
            for (region, no_map) in &self.reserved {
                b.begin(&format!("buffer@{:x}", region.0)).reg(*region);
                if *no_map {
                    b.property("no-map", &[]);
                }
                b.end();
            }
            b.begin("anywhere").property("size", &0x1000u64.to_be_bytes()).end().end();
        }
        b.begin("chosen").text("bootargs", self.arguments).text("stdout-path", "/pl011@9000000");
        for (kind, at, arguments) in &self.modules {
            b.begin(&format!("module@0x{:x}", at.0)).text("compatible", &format!("{kind}\0multiboot,module"));
            b.reg(*at);
            if let Some(arguments) = arguments {
                b.text("bootargs", arguments);
            }
            b.end();
        }
        b.end().end();
        b.finish(self.total)
    }

    /// Plans the boot of this machine, with the tree at [`TREE`].
    pub(super) fn plan<'a>(&self, blob: &'a [u8]) -> Result<Plan<'a>, Problem> {
        let region = |(start, size)| Region::new(start, size).unwrap();
        let header = |_| Some(image::header(0, self.image_size, 0xa)) as Option<[u8; HEADER_SIZE]>;
        plan(blob, region((TREE, blob.len() as u64)), region(DEED), header)
    }

    /// The problem that this machine has.
    pub(super) fn problem(&self) -> Problem {
        self.plan(&self.blob()).expect_err("the machine boots")
    }
}
