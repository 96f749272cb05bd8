from engine.sockmap.engine cimport sockmap_engine


_register("sockmap", sockmap_engine)
