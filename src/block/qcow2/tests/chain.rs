//! Reading through many images.

use super::*;
use crate::block::layer::Layer;
use crate::block::stack::read_chain;

const LAYERS: usize = 24;

#[test]
fn a_read_through_n_layers_costs_one_lookup_in_each_and_one_transfer() {
    let images = Images::new();
    let base = noise(1, 4 << 20);
    write_file(&images.path("raw"), &base);
    let (raw, bottom) = (images.name("raw"), images.name("0"));
    run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &raw, &bottom],
    );
    for n in 1..LAYERS {
        images.create_over(
            &n.to_string(),
            "cluster_size=64k",
            &(n - 1).to_string(),
            "qcow2",
            4 << 20,
        );
        // Elsewhere, so that there is an L2 table to look into.
        images.qemu_io(&n.to_string(), &["write -P 1 3M 64k"]);
    }
    let io = reactor();
    let (mut storages, mut layers) = (Vec::new(), Vec::new());
    for n in (0..LAYERS).rev() {
        let storage = sim(images.bytes(&n.to_string()), Sim::default());
        let options = Options {
            has_backing: n > 0,
            ..READ
        };
        let image = io.block_on(open(&io, &storage, options)).expect("open");
        layers.push(Layer::Qcow2(Box::new(image)));
        storages.push(storage);
    }
    let operations = || -> Vec<u64> { storages.iter().map(|s| the_sim(s).operations()).collect() };
    let cost = |offset: u64| -> Vec<u64> {
        let before = operations();
        let mut buf = io.buf(64 << 10);
        io.block_on(read_chain(&layers, &io, offset, buf.sg()))
            .expect("read");
        assert_same(&buf, &base[offset as usize..][..64 << 10], "read");
        let pairs = operations().into_iter().zip(before);
        pairs.map(|(now, before)| now - before).collect()
    };
    // The first read loads a slice of each layer, and has the data at one go.
    let mut want = vec![1; LAYERS];
    want[LAYERS - 1] = 2;
    assert_eq!(cost(0), want, "cold");
    // After that a lookup reads nothing; across clusters, too, a layer's hole is looked at as a whole.
    let mut want = vec![0; LAYERS];
    want[LAYERS - 1] = 1;
    for offset in [0, 512, 65536, 99_840] {
        assert_eq!(cost(offset), want, "warm, at {offset}");
    }
}
